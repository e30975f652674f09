"""Devices: artifacts are run and measured here, over ssh, by a TVM RPC server, or emulated.

Each is sent a folder with the artifact, what runs it, and the inputs, and gives back a folder of outputs; only RPC
speaks a protocol of its own.
"""
