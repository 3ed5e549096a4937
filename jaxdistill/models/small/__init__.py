"""Networks of the jobs that run on a CPU: digits, Fashion-MNIST and scenes."""
