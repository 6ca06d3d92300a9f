"""Exec, Attach and PortForward: the streams themselves. The gRPC calls hand out their URLs.

server              HTTP, tokens; one task per connection
upgrade             from the HTTP request to SPDY or WebSocket, and the session over it
spdy*               SPDY/3.1, with our own framing       websocket*    WebSocket, by wsproto
channels            what both provide: named byte streams with back-pressure
remote_command, port_forward       the protocols over those channels
session             the interface to pods and containers
"""
