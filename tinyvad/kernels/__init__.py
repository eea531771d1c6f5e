"""The Numba inner loops, each beside a readable NumPy twin in the module that calls it.

Every kernel is serial and releases the GIL; callers run several of them in Python threads. Numba's own ``parallel=True``
is not used: its OpenMP pool stalls for seconds when another process takes a core (spinning threads wait for one that
does not run), and the cure, ``OMP_PROC_BIND``, pins the caller's process and all its children to one core.
"""
