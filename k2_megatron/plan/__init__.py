"""What a configuration would run, before anything runs: by formula (`plan_text`), and by building it (`dry_run`)."""

from k2_megatron.plan.text import plan_text

__all__ = ["plan_text"]
