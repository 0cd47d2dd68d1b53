"""TIR kernels, their schedules and their tuning spaces."""
