"""Several servers as one, and archives on several hosts, by Ray (docs/scale.md). No command imports it unless asked to."""
