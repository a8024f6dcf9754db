"""What people look at: the Pareto report and its plots."""
