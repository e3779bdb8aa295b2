"""Configurations: plain assignments, read by configurator.py. One may build on another by a star import."""
