"""Envoy mode: an endpoint picker for Envoy and the Gateway API inference extension, over gRPC.

Envoy carries the bytes; what comes and goes is shown here, and the gateway's scheduler decides where to.
"""
