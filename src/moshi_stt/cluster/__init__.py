"""Several servers as one: replicas on several hosts that Ray places and watches, with HAProxy in front (docs/scale.md).

Ray is imported by `actors.py`, `own_ray.py` and the archive's files alone, when a command asks for them. What decides
(`scaling.py`, `plan.py`, `haproxy.py`) does no I/O. What must outlive Ray does without it: a replica's `worker`, HAProxy, and
`front.py`, which keeps HAProxy running and answers for the whole fleet.
"""
