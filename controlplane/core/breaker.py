class Breaker:
    def may_try(self, now): return True
    def began(self, now): pass
    def succeeded(self, now): pass
    def failed(self, now): pass
