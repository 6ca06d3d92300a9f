"""Steps that pods with and without a VM share: each acquires one resource and releases it."""
