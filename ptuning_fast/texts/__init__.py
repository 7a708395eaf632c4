"""Texts: of tables, such as every Python brings, and the tokens of what is to be continued."""
