"""The wire: what deploy/generate makes of the .proto files here."""
