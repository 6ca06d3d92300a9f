"""Conversion of records and usage to CRI messages. Pure except for the list cache."""
