"""What a run stands on: settings, ranks, machine, folder, start, saving, stopping, logs."""
