"""The application: job files, their data and the summary of a run, for the command line."""
