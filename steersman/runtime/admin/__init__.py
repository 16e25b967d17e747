"""The gateway's admin side: `api` (the port of its own), `client` (what speaks to it), `top` (its state as a page)."""
