import hashlib, json, numpy as np
class Tokenizer:
    kind="byte"; vocab_size=258; bos_id=256; eot_id=257; unknown_id=None
    def encode(self,t): return np.frombuffer(t.encode(),dtype=np.uint8).astype(np.uint32)
    def encode_batch(self,ts): return [self.encode(t) for t in ts]
    def decode(self,ids): return bytes(i for i in ids if i<256).decode(errors="replace")
    def fingerprint(self): return "x"*64
    def save(self,p): p.write_text("{}")
def train_tokenizer(c,t): return Tokenizer()
def load_tokenizer(p): return Tokenizer()
