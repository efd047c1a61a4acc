"""Views of the journal: a line on the console, TensorBoard, Weights & Biases. None of them can stop the run."""

import contextlib
import sys
from pathlib import Path

from k2_megatron.config import Config


class Views:
    """Shows step events; opened on the journal's writer alone (`enabled=False` elsewhere)."""

    def __init__(self, config: Config, folder: Path, *, enabled: bool) -> None:
        self.config = config
        self.enabled = enabled
        self._tensorboard = None
        self._wandb = None
        if enabled and config.log.tensorboard:
            self._tensorboard = _start_tensorboard(folder / "tensorboard")
        if enabled and config.log.wandb:
            self._wandb = _start_wandb(config, folder)

    def step(self, event: dict) -> None:
        """Show a "step" event: TensorBoard and W&B every step, the console every `log.every_steps`."""
        if not self.enabled:
            return
        step, last = event["step"], self.config.train.steps
        scalars = {key: event[key] for key in ("loss", "grad_norm", "learning_rate", "tokens_per_second")}
        for name, values in event.get("layers", {}).items():
            if isinstance(values, list):
                scalars.update({f"{name}/layer_{number:03}": value for number, value in enumerate(values, start=1)})
            else:
                scalars[name] = values
        self._mirror(scalars, step)
        if step % self.config.log.every_steps == 0 or step == last or step == 1:
            print(
                f"step {step:>{len(str(last))}}/{last}  loss {event['loss']:.4f}  grad norm {event['grad_norm']:.3f}  "
                f"lr {event['learning_rate']:.2e}  {event['tokens_per_second']:,.0f} tokens/s  "
                f"{clock(event['step_seconds'] * (last - step))} left",
                flush=True,
            )

    def evaluation(self, step: int, held_out_loss: float) -> None:
        """Show an "evaluation" event."""
        self.say(f"step {step}: held-out loss {held_out_loss:.4f}")
        self._mirror({"held_out_loss": held_out_loss}, step)

    def _mirror(self, scalars: dict[str, float], step: int) -> None:
        """Numbers of `step` to TensorBoard and W&B; one that fails is left out from then on."""
        if self._tensorboard is not None:
            try:
                for name, value in scalars.items():
                    self._tensorboard.add_scalar(name, value, step)
            except OSError as error:
                self._tensorboard = None
                print(f"TensorBoard files cannot be written ({error}); the journal goes on", file=sys.stderr)
        if self._wandb is not None:
            try:
                self._wandb.log(scalars, step=step)
            except Exception as error:  # its network and its library fail in ways of their own
                self._wandb = None
                print(f"Weights & Biases does not take more ({error}); the journal goes on", file=sys.stderr)

    def say(self, text: str) -> None:
        """A sentence on the console."""
        if self.enabled:
            print(text, flush=True)

    def close(self) -> None:
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):  # the run is over, and the journal has it all
                self._tensorboard.close()
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                print(f"Weights & Biases was not closed ({error}); the journal has it all", file=sys.stderr)


def clock(seconds: float) -> str:
    """85 -> "1:25", 3725 -> "1:02:05"."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _start_tensorboard(folder: Path):
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder))
    except OSError as error:
        print(f"TensorBoard files cannot be written ({error}); the journal goes on", file=sys.stderr)
        return None


def _start_wandb(config: Config, folder: Path):
    try:
        import wandb
    except ImportError:
        raise ValueError(
            f'log.wandb = "{config.log.wandb}" needs Weights & Biases, which is not installed: '
            'pip install "k2_megatron[wandb]", or remove log.wandb'
        ) from None
    try:
        return wandb.init(project=config.log.wandb, dir=str(folder), config=config.model_dump(), resume="allow")
    except Exception as error:  # no network, no key, a full disk
        print(f"Weights & Biases cannot be begun ({error}); the journal goes on", file=sys.stderr)
        return None
