"""csrc/*.cu to PTX with nvcc; files whose inputs have not changed are kept."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).resolve().parents[3] / "csrc"
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "-ptx")


def reason_not_to_compile() -> str | None:
    return None if shutil.which("nvcc") else "no nvcc on PATH"


def compile_ptx(sources: list[Path], folder: Path, architecture: str = "sm_80", *more: str) -> list[Path]:
    """Two compilers at a time. Not all that nvcc says of a source: test_compiled.py reads its warnings."""
    headers = b"".join(path.read_bytes() for path in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cuh")]))
    flags = [*FLAGS, f"-arch={architecture}", *more]

    def compile_one(source: Path) -> Path:
        digest = hashlib.sha256(" ".join(flags).encode() + headers + source.read_bytes()).hexdigest()[:16]
        target = folder / f"{source.stem}-{architecture}-{digest}.ptx"
        if not target.exists():
            command = ["nvcc", *flags, f"-I{CSRC}", str(source), "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"nvcc failed on {source.name}:\n{done.stderr[-3000:]}"
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))
