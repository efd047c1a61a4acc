"""What a configuration would run, before anything runs: by formula (`plan_text`), and by building it (`dry_run`)."""
