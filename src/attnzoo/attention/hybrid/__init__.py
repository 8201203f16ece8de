"""Other architectures than scores or one scan: moving averages, filters, pyramids, parallel branches."""
