"""Cache policies: what attention reads of the stored tokens, and what stays stored. One file each."""
