"""Settings: what they are (`settings`), where values come from (`file`, `sources`), and what is wrong (`problems`)."""
