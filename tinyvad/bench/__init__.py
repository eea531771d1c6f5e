"""``tinyvad bench``: streams of products x methods x backbones, run anywhere, and the papers' cost columns."""
