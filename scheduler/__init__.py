"""The pure decisions of Hocket: which request runs where and when.

State machines that take events and a `now` and return plans and actions. They never wait, log,
read a clock, draw unseeded randomness, or know what a tensor, a socket or an actor is. Only the
standard library is imported here, and a test holds it so.
"""
