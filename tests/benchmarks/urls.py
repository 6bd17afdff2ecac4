"""1, 8 and 32 PDFs by URL at 50 and 300 ms latency: plain llm and the library, in one run."""

from __future__ import annotations

import argparse
import asyncio
import gc
import json

from llm_async_attachments import demo

# Plain llm needs 11 s for 8 URLs at 300 ms; 32 take 45 s, and show nothing more.
CASES = ((1, 0.05), (8, 0.05), (32, 0.05), (1, 0.3), (8, 0.3))


def measure() -> list[demo.Report]:
    with demo.own_environment():
        return [measured(urls, delay) for urls, delay in CASES]


def measured(urls: int, delay: float) -> demo.Report:
    report = asyncio.run(demo.run(urls, delay))
    gc.collect()  # the SDK's clients, which nobody closes, would be closed in the next event loop
    return report


def row(report: demo.Report) -> dict[str, float]:
    plain, ours, without = report.plain, report.library, report.without
    return {
        "urls": report.urls,
        "latency_ms": round(report.delay * 1000),
        "plain_over_fetch": round(plain.seconds / report.delay, 1),
        "ours_over_fetch": round(ours.seconds / report.delay, 2),
        "plain_requests": plain.requests,
        "ours_requests": ours.requests,
        "plain_stall_ms": round(plain.stall * 1000),
        "ours_stall_ms": round(ours.stall * 1000),
        "stall_without_ms": round(without.stall * 1000),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = [row(report) for report in measure()]
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    print(
        "                 total time / slowest fetch      requests        longest stall, ms\n"
        "URLs  latency        plain         ours       plain  ours    plain   ours  without"
    )
    for r in rows:
        print(
            f"{r['urls']:>4}  {r['latency_ms']:>4} ms  {r['plain_over_fetch']:>11}  "
            f"{r['ours_over_fetch']:>11}  {r['plain_requests']:>10} {r['ours_requests']:>5}  "
            f"{r['plain_stall_ms']:>7}  {r['ours_stall_ms']:>5}  {r['stall_without_ms']:>7}"
        )
    print("\n(without: the same prompt without attachments)")


if __name__ == "__main__":
    main()
