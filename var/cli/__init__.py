"""The commands of `python -m var`. No other folder of `var` uses the names of options or prints results."""
