"""The commands of `python -m var`. Only this folder knows the names of options and prints."""
