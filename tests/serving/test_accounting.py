"""Exact counts through HTTP: R requests of P prompt tokens and T output tokens, one by one.

The numbers are those that vLLM's own test of its metrics demands.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from urllib.parse import urlsplit

import pytest

from tests.serving.servers import running_server

R, P, T = 7, 24, 9


class Client:
    def __init__(self, url):
        self._netloc = urlsplit(url).netloc

    def get(self, path):
        return self._call("GET", path)

    def complete(self, **body):
        return json.loads(self._call("POST", "/v1/completions", {"model": "fake"} | body))

    def chat(self, **body):
        return json.loads(self._call("POST", "/v1/chat/completions", {"model": "fake"} | body))

    def hang_up(self, **body):
        """Send a streaming request and leave after its first bytes."""
        connection = http.client.HTTPConnection(self._netloc, timeout=30)
        body = json.dumps({"model": "fake", "stream": True} | body)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        connection.getresponse().read(1)
        connection.close()

    def page(self, path="/metrics"):
        """Return the samples of a page: {(name, labels without the model): value}."""
        samples = {}
        for line in self.get(path).splitlines():
            if line and not line.startswith("#"):
                series, _, value = line.rpartition(" ")
                name, _, labels = series.rstrip("}").partition("{")
                pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
                pairs.pop("model", None)
                pairs.pop("model_name", None)
                samples[name, tuple(sorted(pairs.items()))] = float(value)
        return samples

    def _call(self, method, path, body=None):
        connection = http.client.HTTPConnection(self._netloc, timeout=30)
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, body and json.dumps(body), headers)
        text = connection.getresponse().read().decode()
        connection.close()
        return text


@pytest.fixture(scope="module")
def served():
    """A server after R requests; their prompts differ from the first token on."""
    with running_server("--fake") as server:
        client = Client(server.url)
        for number in range(R):
            prompt = f"{number}" * P
            answer = client.complete(
                prompt=prompt, max_tokens=T, ignore_eos=True, seed=number, temperature=1
            )
            assert answer["usage"]["prompt_tokens"] == P
            assert answer["usage"]["completion_tokens"] == T
        yield client


def total(samples, name, **labels):
    found = [
        value
        for (series, pairs), value in samples.items()
        if series == name and labels.items() <= dict(pairs).items()
    ]
    assert found, f"{name} {labels} is not on the page"
    return sum(found)


EXPECTED = {
    "time_to_first_token_seconds_count": R,
    "inter_token_latency_seconds_count": R * (T - 1),
    "request_time_per_output_token_seconds_count": R,
    "e2e_request_latency_seconds_count": R,
    "request_queue_time_seconds_count": R,
    "request_inference_time_seconds_count": R,
    "request_prefill_time_seconds_count": R,
    "request_decode_time_seconds_count": R,
    "request_num_preemptions_count": R,
    "request_num_preemptions_sum": 0,
    "prompt_tokens_total": R * P,
    "generation_tokens_total": R * T,
    "request_prompt_tokens_sum": R * P,
    "request_prompt_tokens_count": R,
    "request_prefill_kv_computed_tokens_sum": R * P,
    "request_generation_tokens_sum": R * T,
    "request_generation_tokens_count": R,
    "iteration_tokens_total_sum": R * (P + T),
    "iteration_tokens_total_count": R * T,
    "request_success_total": R,
    "request_params_n_sum": R,
    "request_params_n_count": R,
    "request_params_max_tokens_sum": R * T,
    "request_params_max_tokens_count": R,
    "prefix_cache_queries_total": R * P,
    "prefix_cache_hits_total": 0,
    "num_preemptions_total": 0,
    "num_requests_running": 0,
    "num_requests_waiting": 0,
    "num_requests_waiting_by_reason": 0,
    "kv_cache_usage_perc": 0,
}


def test_the_counts_of_vllms_own_test(served):
    samples = served.page("/metrics/vllm")
    counted = {name: total(samples, f"vllm:{name}") for name in EXPECTED}
    assert counted == EXPECTED
    assert total(samples, "vllm:request_success_total", finished_reason="length") == R
    blocks = {"block_size": "16", "num_gpu_blocks": "16384", "kv_cache_size_tokens": "262144"}
    concurrency = {"max_model_len": "8192", "kv_cache_max_concurrency": "32.0"}
    assert total(samples, "vllm:cache_config_info", **blocks, **concurrency) == 1
    for reason in ("capacity", "deferred"):
        assert total(samples, "vllm:num_requests_waiting_by_reason", reason=reason) == 0
    series = [labels for name, labels in samples if name == "vllm:request_success_total"]
    assert len(series) == 4, "over both endpoints"
    assert not any("endpoint" in dict(labels) for labels in series)


def test_the_native_page_says_the_same(served):
    samples = served.page()
    assert total(samples, "hocket_requests_total") == R
    assert total(samples, "hocket_requests_total", endpoint="completions", outcome="length") == R
    assert total(samples, "hocket_requests_total", endpoint="chat") == 0
    assert total(samples, "hocket_schedule_decision_seconds_count") == R * T
    assert total(samples, "hocket_detokenize_seconds_count") == R * T
    assert total(samples, "hocket_time_to_first_token_seconds_count") == R
    assert total(samples, "hocket_inter_token_latency_seconds_count") == R * (T - 1)
    assert total(samples, "hocket_prompt_tokens_total") == R * P
    assert total(samples, "hocket_generation_tokens_total") == R * T
    # The last token of a request is sampled and never computed.
    assert total(samples, "hocket_computed_tokens_total") == R * (P + T - 1)
    assert total(samples, "hocket_step_tokens_sum") == R * (P + T - 1)
    assert total(samples, "hocket_step_seconds_count") == R * T
    assert total(samples, "hocket_steps_total") == R * T
    assert total(samples, "hocket_batch_size_sum") == R * T
    blocks = {
        dict(labels)["state"]: value
        for (name, labels), value in samples.items()
        if name == "hocket_kv_blocks"
    }
    assert sum(blocks.values()) == 16_384
    # Each request leaves its one full block of 16 prompt tokens and the prompt's tail in the cache.
    assert blocks["used"] == blocks["claimed"] == 0
    assert blocks["cached"] == R * 2
    assert total(samples, "hocket_startup_seconds", phase="total") > 0
    assert total(samples, "hocket_build_info") == total(samples, "hocket_instance_up") == 1
    # Both are Unix time: the server started, then made its steps.
    last_step_s = total(samples, "hocket_last_step_timestamp_seconds")
    assert 0 < last_step_s - total(samples, "process_start_time_seconds") < 600
    assert total(samples, "process_resident_memory_bytes") > 1 << 20


def test_prefix_hits_count_in_prompts_and_are_told_apart(served):
    before = served.page("/metrics/vllm")
    prompt = "A" * 40
    for _ in range(2):
        served.complete(prompt=prompt, max_tokens=2, ignore_eos=True)
    after = served.page("/metrics/vllm")

    def grown(name):
        return total(after, f"vllm:{name}") - total(before, f"vllm:{name}")

    assert grown("prompt_tokens_total") == grown("prefix_cache_queries_total") == 80
    # All but the last token, which has to be computed for its logits.
    assert grown("prefix_cache_hits_total") == grown("prompt_tokens_cached_total") == 39
    assert grown("request_prefill_kv_computed_tokens_sum") == 80 - 39


def test_a_prompt_longer_than_a_step_counts_with_its_first_token(served):
    before = served.page("/metrics/vllm")
    served.complete(prompt="L" * 1100, max_tokens=T, ignore_eos=True)
    after = served.page("/metrics/vllm")

    def grown(name, **labels):
        return total(after, f"vllm:{name}", **labels) - total(before, f"vllm:{name}", **labels)

    assert grown("iteration_tokens_total_count") == T
    assert grown("iteration_tokens_total_sum") == 1100 + T
    # All but one of the reports are of one token: that one has the prompt, too.
    assert grown("iteration_tokens_total_bucket", le="1.0") == T - 1
    assert grown("iteration_tokens_total_bucket", le="1024.0") == T - 1


def test_requests_are_told_apart_by_endpoint(served):
    before = served.page()
    served.chat(messages=[{"role": "user", "content": "hi"}], max_tokens=2, ignore_eos=True)
    after = served.page()

    def grown(**labels):
        name = "hocket_requests_total"
        return total(after, name, **labels) - total(before, name, **labels)

    assert (grown(endpoint="chat", outcome="length"), grown()) == (1, 1)


def test_choices_are_requests_and_their_prompts_are_counted(served):
    before = served.page("/metrics/vllm")
    served.complete(prompt=["BB", "CCC"], n=3, max_tokens=2, ignore_eos=True, temperature=1)
    after = served.page("/metrics/vllm")

    def grown(name):
        return total(after, f"vllm:{name}") - total(before, f"vllm:{name}")

    assert grown("request_success_total") == 6
    assert (grown("request_params_n_count"), grown("request_params_n_sum")) == (2, 6)
    assert grown("prompt_tokens_total") == 3 * 2 + 3 * 3


def test_after_hang_ups_the_gauges_are_exactly_zero(served):
    before = total(served.page(), "hocket_requests_total", outcome="abort")
    for number in range(8):
        served.hang_up(prompt=f"x{number}", max_tokens=4000, ignore_eos=True)
    deadline = time.monotonic() + 20
    while True:
        samples = served.page()
        aborted = total(samples, "hocket_requests_total", outcome="abort") - before
        gauges = [
            total(samples, f"hocket_{name}")
            for name in ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
        ]
        if (aborted, gauges) == (8, [0, 0, 0]):
            break
        assert time.monotonic() < deadline, (aborted, gauges)
        time.sleep(0.02)
    assert total(samples, "hocket_kv_blocks", state="used") == 0


def test_http_answers_are_counted_by_template_and_status(served):
    before = served.page()
    served.get("/v1/models/secret-name")
    served.get("/no/such/secret")
    served.get("/v1/completions")
    after = served.page()

    def grown(route, status):
        labels = {"route": route, "status": status}
        key = ("hocket_http_requests_total", tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0)

    assert grown("/v1/models/{model:path}", "404") == 1
    assert grown("none", "404") == 1
    assert grown("/v1/completions", "405") == 1
    assert grown("/metrics", "200") == 1
    assert "secret" not in served.get("/metrics")
