"""tinyvad: visual anomaly detection that is proven to fit the chip it was built for."""
