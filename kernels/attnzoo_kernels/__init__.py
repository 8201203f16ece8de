"""Operations of attnzoo that no library offers fused: one folder per op, depending on torch alone."""
