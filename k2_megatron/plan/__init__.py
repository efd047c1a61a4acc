"""What a configuration would run, before anything runs: by formula (`text`), and by building it (`dry_run`)."""
