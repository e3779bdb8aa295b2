"""One file a run: plain assignments that configurator.py reads.

One may build on another by a star import; names of your own start with an underscore.
"""
