"""Which keys a query may use."""
