"""What the project costs on this machine: a file a measurement, figures printed as they come."""
