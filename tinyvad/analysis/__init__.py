"""``tinyvad analyse``: what a build's tapped features say of products; facts and pictures of PCA feature importance."""
