"""What runs on the nodes: sent there as text (`kinema.cluster.remote`), so each module keeps to
Python 3.9 and the standard library, and its `main(**arguments)` returns JSON values."""
