"""What operators see: the table of metrics, and what is made of it. It decides nothing."""
