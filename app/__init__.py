"""DynamicKV Explorer: the page. It draws run records and knows nothing about attention or
caches.
"""
