"""The command line: `kvmesh up | down | run | generate | chat | status | models | bench`.

Composes processes and the client; computes nothing itself.
"""
