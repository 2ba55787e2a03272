"""What is sent, and when: from a `WorkloadSpec` to a plan, before the first request goes out."""
