"""Integrations with other libraries; each imports the core, and nothing in the core imports them."""
