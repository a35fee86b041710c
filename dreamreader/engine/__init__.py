"""The engine: sites, hooks, cache and firing report, driven by a `Reader`.

Other packages import from here alone; its modules are its own.
"""

