"""What people look at: the run report."""
