"""Before anything else: ops whose backward adds samples up inside, in the words of simpler ones (run.py)."""
