"""Machine facts in the JSON, one table that says what pytest-benchmark's does not, and what this machine lacks."""

import gc
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from bench.case import OUT_OF_MEMORY, share_time
from bench.peers import facts
from bench.report.tables import COLUMNS, row

OURS = ("bench", "mmcore", "mmkernels")


class BenchFile(pytest.Module):
    """Skipped, with its reason, where it needs a package that is not installed; else the machine's other benchmarks
    would not be run either."""

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        try:
            return super().collect()
        except self.CollectError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and cause.name and not cause.name.startswith(OURS):
                pytest.skip(f"{cause.name} is not installed", allow_module_level=True)
            raise


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
    return BenchFile.from_parent(parent, path=module_path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--op", action="append", metavar="NAME", help="those of a module of bench/ops alone")
    parser.addoption("--largest-first", action="store_true", help="of every op its largest shapes, then smaller ones")
    parser.addoption(
        "--plain", action="store_true", help="without contenders that are compiled for minutes or have to be installed"
    )
    parser.addoption(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of features and autocast; bfloat16 on a GPU, float32 on a CPU, if it is left out",
    )
    parser.addoption(
        "--claims", action="store_true", help="also assert what is said of the results, in paired runs of their own"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Before the modules of benchmarks read it."""
    if dtype := config.getoption("--dtype", None):
        os.environ["MMCORE_BENCH_DTYPE"] = dtype


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    claims = [item for item in ours if "benchmark" not in getattr(item, "fixturenames", ())]
    share_time(len(ours) - len(claims))
    if not config.getoption("--claims"):
        for item in claims:
            item.add_marker(pytest.mark.skip(reason="a claim, which --claims asserts"))


def pytest_collection_finish() -> None:
    """What importing made stays: each garbage collection of a case would walk it all, a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """What a reader needs to judge the times, and nothing that names the machine."""
    cuda = torch.cuda.is_available()
    cpu = machine_info.get("cpu", {})
    machine_info.clear()
    machine_info.update(
        device=torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        cpu=cpu.get("brand_raw", platform.machine()),
        torch=torch.__version__,
        triton=triton.__version__,
        python=platform.python_version(),
        peers=facts(),
    )


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Without each round's time, which is most of the file: the percentiles are kept. With what did not fit."""
    slim(output_json)
    if OUT_OF_MEMORY:
        output_json["out_of_memory"] = OUT_OF_MEMORY


def slim(document: dict[str, Any]) -> None:
    commit = document["commit_info"]
    document["commit_info"] = {key: commit[key] for key in ("id", "time", "dirty") if key in commit}
    for case in document["benchmarks"]:
        case["stats"].pop("data", None)


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is None or not session.benchmarks:
        return
    # one that was interrupted has no rounds, or does not say whose it is
    made = [b.as_dict(include_data=False) for b in session.benchmarks if b.stats.rounds]
    cases = [case for case in made if "contender" in case["extra_info"]]
    rows = [COLUMNS, *(row(case) for case in cases)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(COLUMNS))]
    terminalreporter.section("mmcore bench")
    for r in rows:
        terminalreporter.line(
            "  ".join(cell.rjust(w) if i > 1 else cell.ljust(w) for i, (cell, w) in enumerate(zip(r, widths)))
        )
    for case in OUT_OF_MEMORY:
        terminalreporter.line(f"{case['group']}  {case['extra_info']['contender']}  out of memory")
    terminalreporter.line("peers:")
    for name, fact in facts().items():
        terminalreporter.line(f"  {name} {fact}")
