"""The lab starts and stops the real components that tests, measurements and the demo need."""
