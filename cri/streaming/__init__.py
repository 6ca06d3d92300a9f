"""Exec, Attach and PortForward: the streams themselves, beside the gRPC socket that hands out their URLs.

server        HTTP, tokens, upgrades; one task per connection
spdy*         SPDY/3.1, whose framing is ours          websocket*    WebSocket, by wsproto
channels      what both give: named byte streams with back-pressure
remote_command, port_forward       what is spoken over them
session       all that this package knows of pods and containers
"""
