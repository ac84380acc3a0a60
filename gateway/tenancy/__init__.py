"""Tenants: API keys (`keys`), and what each tenant may have and has used (`tenants`)."""
