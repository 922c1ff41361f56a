"""Starting everything that a run needs, and stopping it whatever happens."""
