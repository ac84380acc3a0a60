"""What `/metrics` says, read by the client library and by a real Prometheus."""

from __future__ import annotations

import asyncio
import os
import shutil
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.demo.processes import free_port
from tests.engine.live import LiveEngine
from tests.wire.conftest import running_gateway

SCRAPE_CONFIG = """\
global: {{scrape_interval: 250ms, scrape_timeout: 250ms}}
scrape_configs:
  - job_name: justitia
    static_configs: [{{targets: ["{target}"]}}]
"""


@pytest.mark.engine
async def test_a_real_prometheus_answers_queries_for_queue_time_jct_and_kv_held(
    engine: LiveEngine, tmp_path: Path
) -> None:
    binary = shutil.which("prometheus")
    if binary is None:
        if os.environ.get("CI"):
            pytest.fail("prometheus is not installed")
        pytest.skip("prometheus is not installed")
    engine.wait_ready()
    engine.lengths({"scraped": 400})
    async with running_gateway(engine=engine.url, link=engine.link_address) as gateway:
        await gateway.until(lambda: gateway.app.flow.engine.up and gateway.app.flow.engine.reporting)
        port = free_port()
        (tmp_path / "prometheus.yml").write_text(SCRAPE_CONFIG.format(target=gateway.url.removeprefix("http://")))
        prometheus = await asyncio.create_subprocess_exec(
            binary,
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=error",
        )
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:

                async def query(expression: str) -> float:
                    try:
                        answer = await client.get("/api/v1/query", params={"query": expression})
                        answer.raise_for_status()
                    except httpx.HTTPError:
                        return 0.0  # it is starting
                    return sum(float(series["value"][1]) for series in answer.json()["data"]["result"])

                async def until_positive(expression: str) -> float:
                    async with asyncio.timeout(30):
                        while not (value := await query(expression)) > 0:
                            await asyncio.sleep(0.1)
                    return value

                await until_positive("justitia_engine_up")
                tasks = [
                    asyncio.create_task(
                        gateway.chat(
                            f"scraped-{number}",
                            headers={"X-Agent-Class": "scraped", "X-Agent-Final": "true"},
                            vllm_xargs={"forced_length_key": "scraped"},
                        )
                    )
                    for number in range(24)
                ]
                assert await until_positive("justitia_kv_held_tokens") <= await query("justitia_kv_capacity_tokens")
                assert {answer.status_code for answer in await asyncio.gather(*tasks)} == {200}
                assert await until_positive('justitia_agent_jct_seconds_count{agent_class="scraped"} == 24')
                assert await until_positive("histogram_quantile(0.9, sum by (le) (justitia_agent_jct_seconds_bucket))")
                assert await until_positive("justitia_queue_seconds_sum / justitia_queue_seconds_count")
                assert await until_positive("max_over_time(justitia_kv_held_tokens[1m])")
                await gateway.until(lambda: gateway.app.flow.engine.held_tokens == 0)
        finally:
            prometheus.terminate()
            await prometheus.wait()


async def test_the_exposition_parses_and_has_bounded_labels() -> None:
    async with running_gateway(engine="unix:/tmp/no-engine-is-here.sock") as gateway:
        for number in range(1100):
            gateway.app.metrics.agents.finished("default", f"class-{number}", 1.0)
        await gateway.chat()
        families = {
            family.name: family
            for family in text_string_to_metric_families((await gateway.client.get("/metrics")).text)
        }
    assert all(name.startswith(("justitia_", "gen_ai_server_")) for name in families)
    classes = {sample.labels["agent_class"] for sample in families["justitia_agents_finished"].samples}
    assert len(classes) == 1001
    assert "other" in classes
    assert families["justitia_engine_up"].samples[0].value == 0
    rejected = [
        sample for sample in families["justitia_requests"].samples if sample.labels.get("outcome") == "rejected"
    ]
    assert rejected[0].value == 1
