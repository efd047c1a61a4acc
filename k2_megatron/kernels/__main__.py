"""`python -m k2_megatron.kernels`: the backend that "auto" takes here for each op, why, and what else there is."""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table

from k2_megatron.kernels.dispatch import BACKENDS, OPS, choose_backend, extension, obstacle


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    table = Table(title=f"k2_megatron kernels on {device} ({where}), torch {torch.__version__}", title_justify="left")
    for heading in ("op", "backend", "reason", "also available"):
        table.add_column(heading)
    for op in OPS:
        choice = choose_backend(op, "auto", device)
        others = [name for name in BACKENDS if name != choice.backend and not obstacle(op, name, device)]
        table.add_row(op, choice.backend, choice.reason, ", ".join(others) or "-")
    console = Console()
    console.print(table)
    for backend in ("cpu", "cuda"):
        module, reason = extension(backend)
        details = f" ({module.instruction_set})" if module and backend == "cpu" else ""
        state = f"k2_megatron._{backend}: built{details}" if module else reason
        console.print(state, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
